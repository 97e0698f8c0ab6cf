"""Pages: the report in one HTML file, its sections, and the charts in them."""
