"""From a checkpoint file to a network: safe reading, and the architectures that fit a state dict."""
