"""Curvature from one gradient pass: `request` asks for it, `measure` takes it, `bases` has the formulas."""
