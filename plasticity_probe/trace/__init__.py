"""Traces of measurements in HDF5: written without loss, read without this package."""
