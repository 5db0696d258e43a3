# kfac_fast_add_cuda_kernels(target): adds the CUDA kernels. The caller enables the language and picks architectures.
set(KFAC_FAST_CUDA_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/commit.cu
    ${CMAKE_CURRENT_LIST_DIR}/damped_inverse.cu
    ${CMAKE_CURRENT_LIST_DIR}/factor_update.cu
    ${CMAKE_CURRENT_LIST_DIR}/precondition.cu
    ${CMAKE_CURRENT_LIST_DIR}/table.cu)

function(kfac_fast_add_cuda_kernels target)
  target_sources(${target} PRIVATE ${KFAC_FAST_CUDA_SOURCES})
  target_compile_definitions(${target} PRIVATE KFAC_FAST_WITH_CUDA)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-O3;-lineinfo>")
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    # Line tables compress well, but not in the default mode: a sixth of the size.
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
  endif()
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Static)
endfunction()
