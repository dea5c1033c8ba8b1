"""Figures of traces: what to draw, as data, and the drawing."""
