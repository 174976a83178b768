"""All that touches Accelerate and the ranks: devices, the start, collectives, how a script begins and ends, hangs."""
