"""How an idea can be wrong: a study again with one thing changed at a time, and a first look at a method."""
