package PVE::BackupAccess::Error;

use v5.36;

use overload
    '""' => sub ($self, @) { $self->{message} },
    bool => sub { 1 },
    fallback => 1;

sub throw ($class, $error_class, $message, %context) {

    # Both may contain text of callers and peers; names of files are bytes.
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

PVE::BackupAccess::Error - the exception class of PVE::BackupAccess

=head1 SYNOPSIS

=for run proxmox

    eval { $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }]) };
    if (ref($@) && $@->isa('PVE::BackupAccess::Error')) {
        warn $@;    # one line: device, command, what went wrong
        say 'the device: ', $@->device // 'none', ', the command: ', $@->command // 'none';
        retry() if $@->class eq 'TimeoutError';
    }

=head1 DESCRIPTION

An error is an object that stringifies to one line ending in a newline, such as

    device drive-scsi0: qmp command 'blockdev-add' failed - Could not open '/mnt/x': No space left

The exception of a signal handler or a callback of yours is not wrapped: it is passed on unchanged.

=head1 METHODS

=head2 class

Takes no arguments. Returns QEMU's own class if QEMU refused a command (C<GenericError>, C<DeviceNotFound>, C<CommandNotFound>, ...;
QAPI: C<QapiErrorClass>), or one of these:

=over

=item C<ArgumentError> - an argument is wrong; no command that changes anything was sent

=item C<StateError> - not possible in this state, for example because an access is already active, or none is

=item C<UnsupportedError> - this QEMU or this machine lacks something that is needed

=item C<ConnectionError> - the connection could not be made, or was lost

=item C<TimeoutError> - there was no answer within the time limit

=item C<ProtocolError> - the peer violated the protocol

=item C<IncompleteError> - an answer is incomplete, so it was not used

=item C<NbdError> - an NBD request failed

=item C<SystemError> - a system call failed

=item C<ContentError> - stored data does not match its digest, or a file of digests is not valid

=item C<InterruptedError> - the call was told to stop

=item C<ArchiveError> - an archive of L<PVE::BackupAccess::Provider::Qcow2Chain> is missing or damaged

=back

=head2 command

Takes no arguments. Returns the QMP command that failed, or undef.

=head2 device

Takes no arguments. Returns the device that the error is about, or undef.

=head2 throw

=for run proxmox

    use PVE::BackupAccess::Error;

    eval { PVE::BackupAccess::Error->throw('StateError', 'the store is locked', device => 'drive-scsi0') };
    print $@->device, ': ', $@;

Takes a class, a message without a newline at its end, and optionally C<device> and C<command>. Checks nothing.

Errors: always dies, with an error of that class.

=cut
