"""Reference training runs that write checkpoints."""
