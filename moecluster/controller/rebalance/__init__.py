"""From loads to moves: observe, decide, apply, measure."""
