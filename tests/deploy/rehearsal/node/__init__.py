"""What the kubelet does: volumes, containers, probes and restarts of a pod, on a network of its own."""
