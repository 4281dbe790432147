"""Few-shot evaluation: adapt to N shots, test on fixed items, keep every finished cell."""
