"""The show room: tables -> pictures."""
