"""The model as stages and edges, independent of any backend."""

from step3_hetero.graph.build import build_graph
from step3_hetero.graph.graph import Edge, GraphStage, Param, StageGraph

__all__ = ["Edge", "GraphStage", "Param", "StageGraph", "build_graph"]
