// The one class of this framework that torch's MPS headers name; see Metal/Metal.h.
#pragma once

#import <Metal/Metal.h>

#ifdef __OBJC__
@interface MPSCommandBuffer : NSObject <MTLCommandBuffer>
@property(readonly, nonnull) id<MTLCommandBuffer> commandBuffer;
@end
#endif
