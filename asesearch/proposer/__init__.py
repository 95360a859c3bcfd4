"""What to try next: the space of points, what is believed of them, and the choice among them."""
