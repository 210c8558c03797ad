"""Device catalogue, cost model and planner, imported as ``step3_hetero.placement``."""

if __name__ != "step3_hetero.placement":
    raise ImportError(f"import step3_hetero.placement, not {__name__}")
