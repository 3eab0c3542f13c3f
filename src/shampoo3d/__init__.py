"""3D-Shampoo: Kronecker-factored preconditioning whose work is shared over data, pipeline and tensor parallel ranks."""

from shampoo3d.checkpoint.folder import Loaded
from shampoo3d.checkpoint.manifest import CheckpointError, latest_checkpoint
from shampoo3d.distributed.errors import CallsDifferError, RankLostError
from shampoo3d.distributed.topology import Topology
from shampoo3d.optimizer import Shampoo
from shampoo3d.planning.plan import Plan, PlannedBlock
from shampoo3d.runtime.agreement import StepRefusedError
from shampoo3d.runtime.report import Report
from shampoo3d.runtime.step import UnfinishedStepError
from shampoo3d.settings.computation import Computation
from shampoo3d.settings.distribution import Distribution
from shampoo3d.settings.hyperparams import LayerwiseGrafting, ShampooHyperParams
from shampoo3d.settings.variant import Variant

__all__ = [
    "CallsDifferError",
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
