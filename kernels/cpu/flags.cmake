# Instructions a file may use; cpu.c asks the CPU before it gives out their tables.
set_source_files_properties(cpu/avx2.c PROPERTIES COMPILE_OPTIONS "-O3;-mavx2;-mfma;-mf16c")
set_source_files_properties(cpu/avx512.c PROPERTIES COMPILE_OPTIONS
    "-O3;-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx512vnni;-mfma;-mf16c")
