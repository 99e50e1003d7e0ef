"""ROC figures with their intervals, and the axes that everything is drawn on."""
