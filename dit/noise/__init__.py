"""How data becomes noise, and what the network's output says about both."""
