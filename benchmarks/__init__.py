"""What fastattr costs and how good its maps are. Nothing imports this package."""
