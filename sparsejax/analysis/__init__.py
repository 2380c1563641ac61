"""What a sparse network looks like and costs: summaries, FLOPs, overlap of masks, gradient flow, plots."""

from sparsejax.analysis.flops import ForwardFlops as ForwardFlops
from sparsejax.analysis.flops import layer_flops as layer_flops
from sparsejax.analysis.flops import rigl_training_flops as rigl_training_flops
from sparsejax.analysis.flops import sparse_flops as sparse_flops
from sparsejax.analysis.flops import training_flops as training_flops
from sparsejax.analysis.flow import GradientFlow as GradientFlow
from sparsejax.analysis.flow import gradient_flow as gradient_flow
from sparsejax.analysis.mask_plots import plot_density as plot_density
from sparsejax.analysis.mask_plots import plot_masks as plot_masks
from sparsejax.analysis.overlap import Exploration as Exploration
from sparsejax.analysis.overlap import MaskChange as MaskChange
from sparsejax.analysis.overlap import Overlap as Overlap
from sparsejax.analysis.overlap import exploration_init as exploration_init
from sparsejax.analysis.overlap import exploration_rate as exploration_rate
from sparsejax.analysis.overlap import exploration_rates as exploration_rates
from sparsejax.analysis.overlap import exploration_update as exploration_update
from sparsejax.analysis.overlap import mask_overlap as mask_overlap
from sparsejax.analysis.plots import plot_churn as plot_churn
from sparsejax.analysis.plots import plot_metric as plot_metric
from sparsejax.analysis.summary import Row as Row
from sparsejax.analysis.summary import Summary as Summary
from sparsejax.analysis.summary import summarize as summarize
