"""Named data sets, files and user loaders as arrays of examples."""
