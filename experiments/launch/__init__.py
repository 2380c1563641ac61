"""Starting a run on many machines: `tpu_vm.sh` on Cloud TPU VMs, `gke.sh` on GKE, `local` on this machine."""
