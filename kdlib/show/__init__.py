"""Display: tables, figures, and the failure explorer."""
