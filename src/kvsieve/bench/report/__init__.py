"""What people look at: the rows of ``kvsieve bench quality`` as a page, as tables, as advice."""
