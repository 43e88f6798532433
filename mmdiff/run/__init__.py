"""What a run leaves behind: its folder, record, curves and samples, and the pages made of them."""
