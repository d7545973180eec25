"""What `cbp-fast bench` times: networks, the ways to do a step that are compared, and the suites."""
