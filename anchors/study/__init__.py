"""What every study has in common: one loop, one report."""
