"""Does a quantity measured now tell what a network will learn next? Statistics over runs, without torch."""
