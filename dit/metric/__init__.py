"""How good and how varied the images are."""
