/* Stands in for libnvinfer, libnvinfer_plugin and libnvonnxparser, so that NVIDIA's Python bindings can be imported where
 * TensorRT is not: they need these names when they are loaded. The first call of any of them ends the process. */
#include <stdlib.h>

#define STUB(name) void *name(void) { abort(); }

STUB(createInferBuilder_INTERNAL)
STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL)
STUB(createNvOnnxParserRefitter_INTERNAL)
STUB(createNvOnnxParser_INTERNAL)
STUB(getBuilderPluginRegistry)
STUB(getNvOnnxParserVersion)
STUB(getPluginRegistry)
STUB(initLibNvInferPlugins)
