"""What settings, records and result files may hold: units, bounds, remedies. Imports no torch."""
