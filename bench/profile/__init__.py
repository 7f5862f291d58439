"""One step of a case under a profiler: Nsight Compute, Nsight Systems or torch.profiler, stage by stage."""
