/* A device: its memory and the host arena that its kernels read. Contract: gpu.h. */
#pragma once

#include <kernels/gpu.h>

int winnow_gpu_probe(uint32_t device_ordinal, char text[256]);
