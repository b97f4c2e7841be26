"""Pages that stand alone: one HTML file each, with pictures, data and scripts inside."""
