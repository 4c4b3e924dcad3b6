package matrix

// The error codes that the bus itself answers with or reads (client-server API,
// "Standard error response"; S2S names the same ones where they apply).
const (
	MBadJSON                 = "M_BAD_JSON"
	MForbidden               = "M_FORBIDDEN"
	MInvalidParam            = "M_INVALID_PARAM"
	MLimitExceeded           = "M_LIMIT_EXCEEDED"
	MMissingParam            = "M_MISSING_PARAM"
	MNotFound                = "M_NOT_FOUND"
	MNotJSON                 = "M_NOT_JSON"
	MTooLarge                = "M_TOO_LARGE"
	MUnableToAuthoriseJoin   = "M_UNABLE_TO_AUTHORISE_JOIN"
	MUnableDueToPartialState = "M_UNABLE_DUE_TO_PARTIAL_STATE"
	MUnauthorized            = "M_UNAUTHORIZED"
	MUnknown                 = "M_UNKNOWN"
	MUnrecognized            = "M_UNRECOGNIZED"
)

// ErrorJSON returns a standard error body, canonical JSON of the two members
// errcode and error. The message is for people and must hold no secret; bytes
// in it that are not UTF-8 become U+FFFD.
func ErrorJSON(errcode, message string) []byte {
	b := make([]byte, 0, len(`{"errcode":"","error":""}`)+len(errcode)+len(message))
	b = append(b, `{"errcode":`...)
	b = AppendString(b, errcode)
	b = append(b, `,"error":`...)
	b = AppendString(b, message)
	return append(b, '}')
}
