"""Matrix-free linear algebra on plain tensors; knows nothing of networks."""
