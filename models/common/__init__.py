"""What several methods share: log-normalised cells and their directions, a gene's map made counts, and its predictive."""
