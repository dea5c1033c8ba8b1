"""The probes of this package, one file a family; a new one is one file and one test."""
