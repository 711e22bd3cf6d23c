"""A first run: chat with a real target without and with Gumiho."""
