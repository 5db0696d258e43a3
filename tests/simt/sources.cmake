# kfac_fast_add_simt_kernels(target): the CUDA sources compiled as C++ together with the shim that runs them on the CPU.
set(KFAC_FAST_SIMT_DIR ${CMAKE_CURRENT_LIST_DIR})
include(${KFAC_FAST_SIMT_DIR}/../../csrc/cuda/sources.cmake)

function(kfac_fast_add_simt_kernels target)
  # Marked as C++ and under their own names: the CUDA language may be enabled in the same project, where a target that
  # has it compiles the very same files with nvcc.
  foreach(source ${KFAC_FAST_CUDA_SOURCES})
    get_filename_component(stem ${source} NAME_WE)
    set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/simt_${stem}.cpp)
    file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${source}\"\n")
    target_sources(${target} PRIVATE ${wrapper})
    set_source_files_properties(${wrapper} PROPERTIES COMPILE_OPTIONS "-O3;-Wno-unknown-pragmas")
  endforeach()
  target_sources(${target} PRIVATE ${KFAC_FAST_SIMT_DIR}/simt.cpp ${KFAC_FAST_SIMT_DIR}/fiber.cpp)
  target_include_directories(${target} BEFORE PRIVATE ${KFAC_FAST_SIMT_DIR}/include ${KFAC_FAST_SIMT_DIR})
  target_compile_definitions(${target} PRIVATE KFAC_FAST_WITH_CUDA)
  target_compile_features(${target} PRIVATE cxx_std_17)
endfunction()
