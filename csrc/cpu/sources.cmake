# kfac_fast_add_cpu_kernels(target): the CPU kernels, compiled once per instruction set, and the table that picks among
# them at run time. The caller links OpenMP; without it the kernels run on one thread.
set(KFAC_FAST_CPU_DIR ${CMAKE_CURRENT_LIST_DIR})

include(CheckCXXCompilerFlag)

set(KFAC_FAST_AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
set(KFAC_FAST_AMX_FLAGS ${KFAC_FAST_AVX512_FLAGS} -mamx-tile -mamx-bf16)

# kfac_fast_add_cpu_isa(target isa vector_bytes FLAGS … [OPS …]); all ops if none are named.
function(kfac_fast_add_cpu_isa target isa vector_bytes)
  cmake_parse_arguments(PARSE_ARGV 3 isa "" "" "FLAGS;OPS")
  if(NOT isa_OPS)
    set(isa_OPS commit damped_inverse factor_update precondition)
  endif()
  list(TRANSFORM isa_OPS REPLACE ".+" "${KFAC_FAST_CPU_DIR}/\\0.cpp" OUTPUT_VARIABLE sources)
  set(kernels ${target}_cpu_${isa})
  add_library(${kernels} OBJECT ${sources})
  target_compile_features(${kernels} PRIVATE cxx_std_17)
  target_compile_definitions(${kernels} PRIVATE KFAC_FAST_ISA=${isa} KFAC_FAST_VECTOR_BYTES=${vector_bytes})
  # -O3 in every configuration: unoptimised, inline functions of the standard headers would come out of line in the
  # instruction set of this file, and the linker might keep that copy for everybody (see isa.h). Vectors never cross
  # an object file, so GCC's notes about their calling convention do not concern us. Nobody reads errno after a square root,
  # and without it square roots vectorise.
  target_compile_options(${kernels} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -Wall -Wextra -Wshadow -Wno-psabi
    # Rows here are short: a call of memcpy or memset costs more than the loop that GCC would replace.
    $<$<CXX_COMPILER_ID:GNU>:-fno-tree-loop-distribute-patterns> ${isa_FLAGS})
  set_target_properties(${kernels} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${kernels}>)
endfunction()

function(kfac_fast_add_cpu_kernels target)
  target_sources(${target} PRIVATE ${KFAC_FAST_CPU_DIR}/amx.cpp ${KFAC_FAST_CPU_DIR}/parallel.cpp
    ${KFAC_FAST_CPU_DIR}/table.cpp)
  if(KFAC_FAST_BASELINE_ONLY)  # a quarter of the build, for a sample of the sanitized tests
    target_compile_definitions(${target} PRIVATE KFAC_FAST_BASELINE_ONLY)
    kfac_fast_add_cpu_isa(${target} baseline 16)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    set(avx2 -mavx2 -mfma -mf16c)
    check_cxx_compiler_flag("-mamx-tile -mamx-bf16" KFAC_FAST_WITH_AMX)
    if(KFAC_FAST_WITH_AMX)
      target_compile_definitions(${target} PRIVATE KFAC_FAST_WITH_AMX)
      kfac_fast_add_cpu_isa(${target} amx 64 FLAGS ${KFAC_FAST_AMX_FLAGS}
        OPS damped_inverse factor_update precondition)
    endif()
    kfac_fast_add_cpu_isa(${target} avx512 64 FLAGS ${KFAC_FAST_AVX512_FLAGS})
    kfac_fast_add_cpu_isa(${target} avx2 32 FLAGS ${avx2})
    kfac_fast_add_cpu_isa(${target} avx2x16 64 FLAGS ${avx2})
    kfac_fast_add_cpu_isa(${target} baseline 16)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
    kfac_fast_add_cpu_isa(${target} neon 16)
  else()
    kfac_fast_add_cpu_isa(${target} baseline 16)
  endif()
endfunction()
