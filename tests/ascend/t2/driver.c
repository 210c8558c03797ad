/* A stand-in for the Ascend driver: enough that torch_npu imports, counts a device and moves bytes.
   Memory is the host's. What would run an operator returns an error, always: a stand-in that says
   success there would make garbage look like a result. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, REFUSED = 500001, FREE_BYTES_GIB = 60, TOTAL_BYTES_GIB = 64 };

static int blank(void **out) { return (*out = malloc(64)) ? OK : REFUSED; }
static int room(void **out, size_t bytes) {
  return posix_memalign(out, 512, bytes ? bytes : 512) ? REFUSED : OK;
}

/* Run an operator. */
int aclopCompileAndExecute(void) { return REFUSED; }
int rtKernelLaunch(void) { return REFUSED; }
int aclopCompileAndExecuteV2(void) { return REFUSED; }

/* Devices. */
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
const char *aclGetRecentErrMsg(void) { return "stand-in driver: nothing runs here"; }
int aclrtGetDeviceCount(uint32_t *count) { return *count = 1, OK; }
int aclrtGetDevice(int32_t *device) { return *device = 0, OK; }
int aclrtGetCurrentContext(void **context) { static int one; return *context = &one, OK; }
int aclrtCreateContext(void **context, int device) { return blank(context); }
int aclrtDeviceGetBareTgid(int *group) { return *group = 1, OK; }
int aclrtDeviceCanAccessPeer(int *can, int one, int other) { return *can = 0, OK; }
int aclGetDeviceCapability(uint32_t device, int kind, int64_t *value) { return *value = 0, OK; }

/* Memory. */
int aclrtMalloc(void **out, size_t bytes, int policy) { return room(out, bytes); }
int aclrtMallocAlign32(void **out, size_t bytes, int policy) { return room(out, bytes); }
int aclrtMallocHost(void **out, size_t bytes) { return room(out, bytes); }
int aclrtFree(void *block) { return free(block), OK; }
int aclrtFreeHost(void *block) { return free(block), OK; }
int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) {
  *unused = (size_t)FREE_BYTES_GIB << 30;
  *total = (size_t)TOTAL_BYTES_GIB << 30;
  return OK;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
  return memcpy(to, from, bytes), OK;
}
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *s) {
  return memcpy(to, from, bytes), OK;
}
int aclrtMemset(void *to, size_t room, int value, size_t bytes) {
  return memset(to, value, bytes), OK;
}

/* Streams, events, options. */
int aclrtCreateStream(void **stream) { return blank(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) {
  return blank(stream);
}
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return blank(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return blank(event); }
int aclrtQueryEventStatus(void *event, int *status) { return *status = 1, OK; }
int aclrtQueryEventWaitStatus(void *event, int *status) { return *status = 1, OK; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) { return *ms = 0, OK; }
int aclrtStreamQuery(void *stream, int *status) { return *status = 0, OK; }
size_t aclGetCompileoptSize(int option) { return 2; }
int aclGetCompileopt(int option, char *value, size_t size) { return value[0] = 0, OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { return *value = 0, OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { return *value = 0, OK; }

/* Asked for, and without effect here. */
#define X(name) int name(void) { return OK; }
X(MsprofGetHashId) X(MsprofRegisterCallback)
X(MsprofReportAdditionalInfo) X(MsprofReportApi)
X(MsprofReportCompactInfo) X(MsprofSysCycleTime)
X(aclAppLog) X(aclCreateDataBuffer)
X(aclCreateTensorDesc) X(aclDestroyDataBuffer)
X(aclDestroyTensorDesc) X(aclFinalize)
X(aclGetTensorDescDimV2) X(aclGetTensorDescFormat)
X(aclGetTensorDescNumDims) X(aclGetTensorDescType)
X(aclInit) X(aclSetCompileopt)
X(aclSetTensorDescName) X(aclSetTensorFormat)
X(aclSetTensorPlaceMent) X(aclSetTensorShape)
X(aclmdlFinalizeDump) X(aclmdlInitDump)
X(aclmdlSetDump) X(aclopCreateAttr)
X(aclopDestroyAttr) X(aclopSetAttrBool)
X(aclopSetAttrDataType) X(aclopSetAttrFloat)
X(aclopSetAttrInt) X(aclopSetAttrListBool)
X(aclopSetAttrListFloat) X(aclopSetAttrListInt)
X(aclopSetAttrListListInt) X(aclopSetAttrString)
X(aclrtBinaryGetFunction) X(aclrtBinaryLoadFromData)
X(aclrtCtxSetSysParamOpt) X(aclrtDestroyEvent)
X(aclrtDestroyStream) X(aclrtDestroyStreamForce)
X(aclrtDeviceEnablePeerAccess) X(aclrtFreePhysical)
X(aclrtGetFunctionAddr) X(aclrtMallocPhysical)
X(aclrtMapMem) X(aclrtMemExportToShareableHandle)
X(aclrtMemImportFromShareableHandle) X(aclrtMemSetPidToShareableHandle)
X(aclrtProcessReport) X(aclrtRecordEvent)
X(aclrtReleaseMemAddress) X(aclrtReserveMemAddress)
X(aclrtResetDevice) X(aclrtResetEvent)
X(aclrtSetCurrentContext) X(aclrtSetDevice)
X(aclrtSetDeviceSatMode) X(aclrtSetOpExecuteTimeOut) X(aclrtSetOpWaitTimeout)
X(aclrtSetStreamFailureMode) X(aclrtSetSysParamOpt)
X(aclrtStreamWaitEvent) X(aclrtSynchronizeDevice)
X(aclrtSynchronizeEvent) X(aclrtSynchronizeStream)
X(aclrtUnmapMem) X(rtDevBinaryRegister)
X(rtFunctionRegister) X(rtGetC2cCtrlAddr)
