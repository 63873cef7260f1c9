// Those classes of this framework that torch's MPS headers name; see Metal/Metal.h.
#pragma once

#import <MetalPerformanceShaders/MetalPerformanceShaders.h>

#ifdef __OBJC__
@interface MPSGraph : NSObject
@end
@interface MPSGraphExecutionDescriptor : NSObject
@end
@interface MPSGraphCompilationDescriptor : NSObject
@end
#endif
