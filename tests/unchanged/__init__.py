"""The safety net of the rebuild: everything once, compared with the values of revision 52d94dd."""
