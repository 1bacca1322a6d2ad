"""Teachers that carry a method are distilled into plain students, beside a control student."""
