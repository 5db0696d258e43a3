# Object library kfac_fast_simt_kernels: the CUDA sources compiled as C++ together with the shim that runs them on the CPU.
include(${CMAKE_CURRENT_LIST_DIR}/../../csrc/cuda/sources.cmake)

add_library(kfac_fast_simt_kernels OBJECT ${CMAKE_CURRENT_LIST_DIR}/simt.cpp ${CMAKE_CURRENT_LIST_DIR}/fiber.cpp
                                          ${CMAKE_CURRENT_LIST_DIR}/../../csrc/plan.cpp)
# Wrapped, not marked as C++: the CUDA language may be enabled in the same project, where a target that has it compiles
# the very same files with nvcc.
foreach(source ${KFAC_FAST_CUDA_SOURCES})
  get_filename_component(stem ${source} NAME_WE)
  set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/simt_${stem}.cpp)
  file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"${source}\"\n")
  target_sources(kfac_fast_simt_kernels PRIVATE ${wrapper})
endforeach()
target_include_directories(kfac_fast_simt_kernels BEFORE PUBLIC ${CMAKE_CURRENT_LIST_DIR}/include
                                                                ${CMAKE_CURRENT_LIST_DIR}
                                                                ${CMAKE_CURRENT_LIST_DIR}/../../csrc)
target_compile_definitions(kfac_fast_simt_kernels PUBLIC KFAC_FAST_WITH_CUDA)
target_compile_features(kfac_fast_simt_kernels PUBLIC cxx_std_17)
# -O2: half the time to compile of -O3 for the same time to run.
target_compile_options(kfac_fast_simt_kernels PRIVATE -O2 -Wno-unknown-pragmas)
set_target_properties(kfac_fast_simt_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)
