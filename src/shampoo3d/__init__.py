"""3D-Shampoo: Kronecker-factored preconditioning whose work is shared over data, pipeline and tensor parallel ranks."""

from shampoo3d.agreement import StepRefusedError
from shampoo3d.checkpoint.folder import Loaded
from shampoo3d.checkpoint.manifest import CheckpointError, latest_checkpoint
from shampoo3d.computation import Computation
from shampoo3d.distribution import Distribution
from shampoo3d.hyperparams import LayerwiseGrafting, ShampooHyperParams
from shampoo3d.lost import RankLostError
from shampoo3d.optimizer import Shampoo
from shampoo3d.plan import Plan, PlannedBlock
from shampoo3d.report import Report
from shampoo3d.stepping import UnfinishedStepError
from shampoo3d.topology import Topology
from shampoo3d.variant import Variant

__all__ = [
    "CheckpointError",
    "Computation",
    "Distribution",
    "LayerwiseGrafting",
    "Loaded",
    "Plan",
    "PlannedBlock",
    "RankLostError",
    "Report",
    "Shampoo",
    "ShampooHyperParams",
    "StepRefusedError",
    "Topology",
    "UnfinishedStepError",
    "Variant",
    "latest_checkpoint",
]
