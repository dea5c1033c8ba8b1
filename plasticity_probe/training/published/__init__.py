"""What papers ran, as data."""
