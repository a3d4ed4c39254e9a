"""Templates, styles and scripts of all HTML pages."""
