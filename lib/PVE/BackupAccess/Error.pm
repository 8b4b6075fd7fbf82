package PVE::BackupAccess::Error;

use v5.36;

use overload
    '""' => sub ($self, @) { $self->{message} },
    bool => sub { 1 },
    fallback => 1;

sub throw ($class, $error_class, $message, %context) {

    # What callers and peers say may be part of both; names of files are bytes.
    s/[[:cntrl:]]/ /ag for $error_class, $message;
    die bless({ %context, class => $error_class, message => "$message\n" }, $class);
}

sub class ($self) { return $self->{class} }
sub command ($self) { return $self->{command} }
sub device ($self) { return $self->{device} }

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Error - what PVE::BackupAccess dies with

=head1 SYNOPSIS

=for run proxmox

    eval { $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }]) };
    if (ref($@) && $@->isa('PVE::BackupAccess::Error')) {
        warn $@;    # one line: device, command, what went wrong
        retry() if $@->class eq 'TimeoutError';
    }

=head1 DESCRIPTION

An error is an object that stringifies to one line ending in a newline, such as

    device drive-scsi0: qmp command 'blockdev-add' failed - Could not open '/mnt/x': No space left

What a signal handler or a callback of yours dies with is not wrapped: it goes on as it is.

=head1 METHODS

=head2 class

QEMU's own class for what QEMU answered (C<GenericError>, C<DeviceNotFound>, C<CommandNotFound>, ...;
QAPI: C<QapiErrorClass>), or one of these:

=over

=item C<ArgumentError> - the request cannot be right; nothing was sent

=item C<StateError> - not now: an access is up already, or none is

=item C<UnsupportedError> - this QEMU or this machine lacks what is needed

=item C<ConnectionError> - the connection could not be made, or was lost

=item C<TimeoutError> - no answer within the time limit

=item C<ProtocolError> - the peer does not speak the protocol

=item C<IncompleteError> - an answer that lacks a part, which is never taken for the whole

=item C<NbdError> - an NBD request failed

=item C<SystemError> - a system call failed

=item C<ContentError> - what is stored is not what its digest says, or a file of digests is none

=item C<InterruptedError> - the call was told to stop

=item C<ArchiveError> - an archive of L<PVE::BackupAccess::Provider::Qcow2Chain> is missing or damaged

=back

=head2 command

The QMP command that failed, or undef.

=head2 device

The device the error is about, or undef.

=head2 throw

    PVE::BackupAccess::Error->throw($class, $message, device => $device);

Dies with a new error. C<$message> has no newline at its end.

=cut
