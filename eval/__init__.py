"""Evidence: scores, costs, the gate and the report. A leaf: it imports neither distill nor compress."""
