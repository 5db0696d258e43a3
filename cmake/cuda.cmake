# Decides whether the CUDA kernels are part of the build, says so, and sets KFAC_FAST_WITH_CUDA.
#
#   KFAC_FAST_CUDA=AUTO  (default) yes if an nvcc is found that compiles and links
#   KFAC_FAST_CUDA=ON    yes, and an error otherwise
#   KFAC_FAST_CUDA=OFF   no
#
# As a CMake definition, an environment variable, or pip install --config-settings=cmake.define.KFAC_FAST_CUDA=ON.
# CUDAARCHS=90-real (environment) restricts the architectures; the default is every one the kernels support.

if(NOT DEFINED KFAC_FAST_CUDA)
  set(KFAC_FAST_CUDA "$ENV{KFAC_FAST_CUDA}")
endif()
if(KFAC_FAST_CUDA STREQUAL "")
  set(KFAC_FAST_CUDA AUTO)
endif()
string(TOUPPER "${KFAC_FAST_CUDA}" KFAC_FAST_CUDA)
if(NOT KFAC_FAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "KFAC_FAST_CUDA must be AUTO, ON or OFF, got '${KFAC_FAST_CUDA}'")
endif()

set(KFAC_FAST_WITH_CUDA OFF)
if(KFAC_FAST_CUDA STREQUAL "OFF")
  message(STATUS "kfac_fast: CPU kernels only (KFAC_FAST_CUDA=OFF)")
  return()
endif()

find_program(KFAC_FAST_NVCC nvcc HINTS $ENV{CUDACXX} ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED ENV{CUDACXX})
  set(KFAC_FAST_NVCC "$ENV{CUDACXX}")
endif()
if(KFAC_FAST_NVCC)
  set(CMAKE_CUDA_COMPILER "${KFAC_FAST_NVCC}")
  # A toolkit installed by pip keeps its libraries in lib/, while nvcc looks in lib64/: the link would fail, and AUTO
  # would quietly build without CUDA.
  get_filename_component(nvcc_real "${KFAC_FAST_NVCC}" REALPATH)
  get_filename_component(toolkit "${nvcc_real}" DIRECTORY)
  get_filename_component(toolkit "${toolkit}" DIRECTORY)
  if(EXISTS "${toolkit}/lib/libcudart_static.a" AND NOT EXISTS "${toolkit}/lib64/libcudart_static.a")
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} -L${toolkit}/lib")
  endif()
  include(CheckLanguage)
  if("$ENV{CUDAARCHS}" STREQUAL "" AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90-real 100-real 120)
  endif()
  set(found_nvcc "${CMAKE_CUDA_COMPILER}")
  unset(CMAKE_CUDA_COMPILER)
  set(ENV{CUDACXX} "${found_nvcc}")
  check_language(CUDA)
endif()

if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(KFAC_FAST_WITH_CUDA ON)
  message(STATUS "kfac_fast: CPU and CUDA kernels (${CMAKE_CUDA_COMPILER}, "
                 "${CMAKE_CUDA_COMPILER_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES})")
elseif(KFAC_FAST_CUDA STREQUAL "ON")
  message(FATAL_ERROR "KFAC_FAST_CUDA=ON, but no nvcc was found that compiles and links a program. "
                      "Put nvcc on PATH or set CUDACXX, or use KFAC_FAST_CUDA=OFF.")
elseif(KFAC_FAST_NVCC)
  message(WARNING "kfac_fast: CPU kernels only: ${KFAC_FAST_NVCC} does not compile and link a program")
else()
  message(STATUS "kfac_fast: CPU kernels only (no nvcc found; KFAC_FAST_CUDA=ON makes that an error)")
endif()
